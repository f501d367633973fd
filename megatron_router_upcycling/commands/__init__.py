"""The commands of ``router-upcycle``, a file each.

``add(commands)`` says what a command takes, for ``--help``; ``run(args)`` does it, importing torch only then.
"""

"""The commands of ``router-upcycle``, a file each.

A file's docstring is what ``--help`` prints, ``add_flags`` adds its flags to a parser, and ``run`` runs the
command, importing torch only then.
"""

"""The commands of ``router-upcycle``, a file each: ``add_flags`` has its flags, ``run`` imports torch."""

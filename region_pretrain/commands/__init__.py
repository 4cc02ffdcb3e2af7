"""The command lines. Each module has a ``main``; a file of the same name in ``tools/`` calls it."""

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()  # before a command imports anything else

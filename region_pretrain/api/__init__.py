"""The Python API: the command lines as functions, for scripts and notebooks.

Each function composes the config that its command would compose, runs it in this process, and
leaves the process as it found it.
"""

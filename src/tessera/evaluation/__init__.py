"""Judging programs that are not trusted.

values      plain data that crosses to and from a program
candidate   the program's side of a session, which runs by itself inside the sandbox
session     the judge's side: the program's functions, and how it ended
seccomp     the system calls that the sandbox refuses
"""

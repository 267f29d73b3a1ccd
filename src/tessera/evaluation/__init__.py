"""Judging programs that are not trusted: what crosses to them (values), what they may not ask the kernel (seccomp)."""

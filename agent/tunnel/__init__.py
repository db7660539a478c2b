"""The tunnel protocol, without I/O: bytes in, events out; commands in, bytes out. Specification: docs/tunnel.md."""

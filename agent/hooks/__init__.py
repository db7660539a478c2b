"""The kernel side's keeper: compiles, loads, pins, attaches and repairs the programs of bpf/ and fills their maps.

The only importer of bcc, and that only in a short-lived child (compile.py). Nothing here sees a payload or a key.
"""

"""Certificates of one mesh. The only package that imports `cryptography`.

One root (may stay offline), one intermediate per host that every verifier accepts only for that host's identities, and
short-lived leaves issued on the host itself: opening a connection or rotating a leaf needs no central service.

    authority.py   make a root, an intermediate, a leaf              (pure, time passed in)
    store.py       root.pem, host.pem, host.key on disk
    commands.py    `underpass ca init`, `underpass ca host`
    issuer.py      who issues leaves on this host, and when to renew
    contexts.py    leaves -> ssl.SSLContext
    verify.py      a verified chain -> the peer's identity           (pure)
"""

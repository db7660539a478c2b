"""The other proxies: what each is told, as text (pure). One file per proxy, `hop.py` for what they share."""

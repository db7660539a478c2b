"""The admin API over HTTP. The only importer of aiohttp."""

"""The web side of SAE Atlas: database, contracts, pages and JSON. Never imports torch or workers."""

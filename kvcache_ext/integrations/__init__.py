"""Bridges to other libraries. Each of them needs its library, and nothing else of kvcache_ext needs them."""

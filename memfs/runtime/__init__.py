"""The resident model: engine, KV cache, composition, residency, and the daemon that serves them.

torch is imported in this package alone, and ``client`` and ``protocol`` do not import it.
"""

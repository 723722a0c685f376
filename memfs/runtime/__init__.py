"""The resident model, and the daemon that serves it.

``daemon``, ``server`` and ``service`` serve clients, ``worker`` has the model's thread; each folder
imports only from those behind it: ``asking``, ``mounting``, ``kv``, ``model``. torch is imported in
this package alone, and ``client`` and ``protocol`` do not import it.
"""

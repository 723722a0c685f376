"""The store on disk (MemVault): opening by directory descriptor, publishing whole, watching."""

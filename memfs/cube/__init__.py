"""What a MemCube is: its layout, metadata, access rules and file formats. No daemons, no torch."""

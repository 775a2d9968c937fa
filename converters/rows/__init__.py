"""What a mapping table says: rows and their ops, config keys both ways, and the ledger of what is covered."""

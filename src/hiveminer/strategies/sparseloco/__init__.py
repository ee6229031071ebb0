"""SparseLoCo: peers train alone for a round and all apply the same compressed updates."""

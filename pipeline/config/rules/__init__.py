"""Rules of settings: where they apply, which values are allowed, and where earlier keys went."""

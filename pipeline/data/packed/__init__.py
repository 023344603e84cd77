"""Images in tar shards, tables and remote folders."""

"""Networks of a block under flow matching, trained alone and joined."""

"""The command `tessera`, one file a verb: parse, wire the rooms together, show. No logic."""

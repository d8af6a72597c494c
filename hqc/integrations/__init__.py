"""hqc in other people's frameworks; each is imported by itself, and needs its own extra."""

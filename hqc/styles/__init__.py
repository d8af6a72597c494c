"""LoRAs of a style from files: their names and keys, reading them, and what a program says of those that it has."""

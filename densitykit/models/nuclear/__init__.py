"""The emulator through the nuclei and its parts."""

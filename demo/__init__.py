"""The built-in demo: drawn scenes, a tiny encoder pretrained on them, and the demo's settings."""

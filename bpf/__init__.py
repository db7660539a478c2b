"""The kernel side: C sources compiled at start by agent/hooks. This package only makes the files findable."""

"""The scoring server: reward models over HTTP (docs/serving.md)."""

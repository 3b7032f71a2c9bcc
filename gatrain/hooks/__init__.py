"""The hooks that gatrain ships, one file each; one of your own is a subclass of `gatrain.Hook`."""

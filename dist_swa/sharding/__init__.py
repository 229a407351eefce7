"""Where the shards of a model are: one class for each layout, and all shards of a model."""

"""From the names in a config to checked, ordered and bound calls of plugins."""

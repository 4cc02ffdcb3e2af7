"""Parts that the methods share: region features, heads, momentum copies, losses."""

"""Parts shared by the methods: region features, heads, momentum copies, losses."""

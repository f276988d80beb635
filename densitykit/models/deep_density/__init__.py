"""From atoms to density: static maps in three dimensions."""

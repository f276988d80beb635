"""Learn, roll out and judge electron-density trajectories."""

__version__ = "0.1.0"

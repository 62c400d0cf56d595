"""What two or more roles share; no role, no command line: data sets, statistics, the model package, MQTT."""

__version__ = "0.1.0"

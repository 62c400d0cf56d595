"""What the roles share: data sets, statistics, the model package, messages, the MQTT link, the command line."""

__version__ = "0.1.0"

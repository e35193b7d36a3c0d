"""Any host: gRPC channels, the frames of a Get, deadlines and watchdogs."""

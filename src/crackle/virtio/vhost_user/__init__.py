"""Devices whose queues another process serves (the vhost-user protocol)."""

"""The metadata service: a JSON document that the host writes and the guest reads over HTTP, at a link-local address.

`store` is the document, `token` the sessions of version 2, `http` requests and answers, `packet`, `tcp` and `stack`
the small TCP/IP behind which it sits, and `service` the thread that joins it to network devices.
"""

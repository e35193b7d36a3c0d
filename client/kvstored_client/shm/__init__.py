"""The same host: calls over the lease socket, tensors through shared memory."""

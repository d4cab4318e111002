"""What a client is told where a request fails: text-embeddings-inference's status codes and bodies."""

STATUS = {  # {error_type: status code}
    "empty": 400,
    "unauthorized": 401,
    "validation": 413,
    "tokenizer": 422,
    "backend": 424,
    "overloaded": 429,
    "unhealthy": 503,
    "timeout": 504,
}


def body_of(path: str, status: int, error_type: str, message: str) -> dict:
    """What a client of ``path`` reads: text-embeddings-inference's form, under ``/v1/`` OpenAI's."""
    if path.startswith("/v1/"):
        return {"message": message, "code": status, "type": error_type}
    return {"error": message, "error_type": error_type}


class RequestError(Exception):
    """A request that gets ``{"error": message, "error_type": error_type}``; the message holds no text of the user's.

    retry_after: seconds after which it may succeed, or None.
    """

    def __init__(self, error_type: str, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.error_type, self.message, self.retry_after = STATUS[error_type], error_type, message, retry_after

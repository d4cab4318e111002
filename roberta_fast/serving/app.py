"""The routes: text-embeddings-inference's where it has one for the task, Hugging Face's and OpenAI's forms beside them."""

from contextlib import asynccontextmanager

import numpy as np
from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

import roberta_fast
from roberta_fast.serving import generation, jobs, page, schemas
from roberta_fast.serving.engine import Engine
from roberta_fast.serving.errors import STATUS, RequestError, body_of
from roberta_fast.serving.guards import Guards
from roberta_fast.serving.metrics import Measured, Metrics
from roberta_fast.serving.service import Service

OPEN_PATHS = ("/", "/health", "/ready")
_ERRORS = {
    "empty": "nothing to compute",
    "unauthorized": "no valid bearer token",
    "validation": "too many texts, tokens or bytes",
    "tokenizer": "a body or a text that cannot be read",
    "backend": "inference failed, or the served model is of another task",
    "overloaded": "too many requests: try again",
    "unhealthy": "not computing",
    "timeout": "not computed in time",
}
_DESCRIPTIONS = {STATUS[name]: text for name, text in _ERRORS.items()} | {
    408: "a body that does not arrive",
    415: "a body that is not JSON",
}
_TYPE_OF_STATUS = {status: error_type for error_type, status in STATUS.items()}
_OTHER_TYPES = {400: "validation", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "validation"}
_STREAMS = {200: {"content": {"text/event-stream": {}}}}  # beside JSON


def create_app(engine: Engine) -> FastAPI:
    """The application that serves ``engine``."""
    settings, task, metrics = engine.settings, engine.task, Metrics()
    service = Service(engine, metrics)

    @asynccontextmanager
    async def lifespan(app):
        async with service.computing():
            yield

    app = FastAPI(
        title=f"roberta_fast: {task}",
        description="Encoders of the RoBERTa and BERT family, batched by real tokens.",
        version=roberta_fast.__version__,
        lifespan=lifespan,
        dependencies=[] if settings.api_key is None else [Security(HTTPBearer(auto_error=False))],
        redirect_slashes=False,  # whose address would be of the client's own Host
        responses={status: {"model": schemas.ErrorResponse, "description": text} for status, text in _DESCRIPTIONS.items()},
    )
    app.add_middleware(Guards, settings.max_request_bytes, settings.timeout, settings.api_key, OPEN_PATHS)
    app.add_middleware(Measured, metrics)
    app.state.service = service
    _handle_errors(app)
    _add_probes(app, service, metrics)
    _add_routes(app, service)
    return app


def _add_probes(app, service, metrics):
    engine, settings = service.engine, service.settings

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def show_page():
        return HTMLResponse(page.rendered(engine.task, settings.model), headers=page.HEADERS)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_class=Response)
    async def health():
        """200 while requests are being computed."""
        service.check_health()
        return Response()

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> dict[str, bool]:
        """200 once the model is loaded and requests are being computed."""
        service.check_health()
        return {"ready": True}

    @app.get("/info", response_model=schemas.InfoResponse)
    async def info():
        """The model and the limits."""
        task, config = engine.task, engine.config
        if task == "embedding":
            model_type = {"embedding": {"pooling": engine.pooling}}
        elif task == "text-classification":
            kind = "reranker" if config.num_labels == 1 else "classifier"
            model_type = {kind: {"id2label": config.id2label, "label2id": config.label2id}}
        else:
            model_type = {task: {}}
        return {
            "model_id": settings.model,
            "model_type": model_type,
            "model_dtype": settings.dtype,
            "task": task,
            "precision": engine.precision,
            "deterministic": settings.deterministic,
            "backend": "huggingface" if settings.stock else "roberta_fast",
            "max_input_length": engine.max_length,
            "max_batch_tokens": engine.max_batch_tokens,
            "max_batch_requests": settings.max_batch_requests,
            "max_concurrent_requests": settings.max_queue,
            "max_client_batch_size": settings.max_client_batch_size,
            "max_new_tokens": engine.max_new_tokens,
            "version": roberta_fast.__version__,
        }

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus():
        """Prometheus' text format, of all workers."""
        return Response(metrics.exposition(), media_type=metrics.content_type)


def _add_routes(app, service):
    """Every route is there whatever the task; those of other tasks answer 424, as text-embeddings-inference does."""

    async def questions(request: Request, asked, parameters, shape):
        service.check_task("question-answering")
        pairs, parameters = [(item.question, item.context) for item in asked], parameters or schemas.QuestionAnsweringParameters()
        return await service.respond(request, len(pairs), jobs.answer_questions, pairs, parameters, shape=shape)

    @app.post("/question", response_model=schemas.AnswerResponse)
    async def question(body: schemas.Question, request: Request):
        """The answer to a question in a context of any length."""
        return await questions(request, [body], None, lambda answers: _first(answers[0]))

    @app.post("/question-answering", response_model=schemas.AnswerResponse | list[schemas.AnswerResponse])
    async def question_answering(body: schemas.QuestionAnsweringRequest, request: Request):
        """Hugging Face's form: an answer, or a list of them where ``top_k`` is above 1; for a list of inputs a list of those."""
        one = (lambda answers: answers) if body.parameters and body.parameters.top_k > 1 else _first
        if isinstance(body.inputs, list):
            return await questions(request, body.inputs, body.parameters, lambda answers: [one(item) for item in answers])
        return await questions(request, [body.inputs], body.parameters, lambda answers: one(answers[0]))

    @app.post("/predict", response_model=list[schemas.PredictionResponse] | list[list[schemas.PredictionResponse]])
    async def predict(body: schemas.PredictRequest, request: Request):
        """The labels of a text, of a pair of texts, or of each of a batch, best first."""
        service.check_task("text-classification")
        batch = isinstance(body.inputs, list) and not (body.inputs and isinstance(body.inputs[0], str))
        texts = [tuple(item) for item in body.inputs] if batch else [_parts(body.inputs)]
        options = (_truncation(body.truncate, body.truncation_direction), "none" if body.raw_scores else None, None)
        shape = (lambda results: results) if batch else (lambda results: results[0])
        return await service.respond(request, len(texts), jobs.classify, texts, *options, shape=shape)

    async def text_classification(body: schemas.TextClassificationRequest, request: Request):
        """Hugging Face's form: for each text its labels, best first."""
        parameters = body.parameters or schemas.TextClassificationParameters()
        texts = [(text,) for text in _listed(body.inputs)]
        options = (_truncation(body.truncate), parameters.function_to_apply, parameters.top_k)
        return await service.respond(request, len(texts), jobs.classify, texts, *options)

    @app.post("/token-classification", response_model=list[schemas.EntityResponse] | list[list[schemas.EntityResponse]])
    async def token_classification(body: schemas.TokenClassificationRequest, request: Request):
        """The entities of a text of any length, or of each of a list."""
        service.check_task("token-classification")
        texts, parameters = _listed(body.inputs), body.parameters or schemas.TokenClassificationParameters()
        shape = (lambda results: results[0]) if isinstance(body.inputs, str) else (lambda results: results)
        return await service.respond(request, len(texts), jobs.find_entities, texts, parameters, shape=shape)

    @app.post("/embed", response_model=list[list[float]])
    async def embed(body: schemas.EmbedRequest, request: Request):
        """An embedding of each text."""
        service.check_task("embedding")
        texts, truncation = _listed(body.inputs), _truncation(body.truncate, body.truncation_direction)
        options = (truncation, body.normalize is not False, body.dimensions, body.prompt_name)
        return await service.respond(request, len(texts), jobs.embed, texts, *options, shape=jobs.numbers)

    @app.post("/similarity", response_model=list[float])
    async def similarity(body: schemas.SimilarityRequest, request: Request):
        """The cosine of each sentence with the source sentence."""
        service.check_task("embedding")
        parameters, others = body.parameters or schemas.SimilarityParameters(), body.inputs.sentences
        jobs.not_empty("sentences", others)
        options = (_truncation(parameters.truncate, parameters.truncation_direction), True, None, parameters.prompt_name)

        def shape(vectors):
            return [float(np.dot(vectors[0], vector)) for vector in vectors[1:]]

        texts = [body.inputs.source_sentence, *others]
        return await service.respond(request, len(others), jobs.embed, texts, *options, shape=shape)

    @app.post("/rerank", response_model=list[schemas.RankResponse])
    async def rerank(body: schemas.RerankRequest, request: Request):
        """The texts by their score for the query, best first."""
        service.check_task("text-classification")
        options = (_truncation(body.truncate, body.truncation_direction), body.raw_scores, body.return_text)
        return await service.respond(request, len(body.texts), jobs.rerank, body.query, body.texts, *options)

    @app.post("/fill-mask", response_model=list[schemas.WordResponse] | list[list[schemas.WordResponse]] | list)
    async def fill_mask(body: schemas.FillMaskRequest, request: Request):
        """The likeliest words for the mask; a list a mask where a text has several, and a list a text where there are several."""
        service.check_task("fill-mask")
        texts, parameters = _listed(body.inputs), body.parameters or schemas.FillMaskParameters()

        def shape(results):
            return _unnested([_unnested(masks) for masks in results], isinstance(body.inputs, str))

        return await service.respond(request, len(texts), jobs.fill_masks, texts, parameters, shape=shape)

    @app.post("/translate", response_model=list[schemas.TranslationResponse])
    async def translate(body: schemas.TranslationRequest, request: Request):
        """Hugging Face's form: a list of the translations of a text or of several."""
        service.check_task("translation")
        texts, parameters = _listed(body.inputs), body.parameters or schemas.TranslationParameters()
        return await service.respond(request, len(texts), generation.translate, texts, parameters)

    async def continued(body, request, shape):
        service.check_task("text-generation")
        texts, parameters = _listed(body.inputs), body.parameters or schemas.TextGenerationParameters()
        if body.stream:
            return await service.stream(request, generation.generate, texts, parameters)
        return await service.respond(request, len(texts), generation.generate, texts, parameters, shape=shape)

    @app.post(
        "/generate",
        response_model=schemas.TextGenerationResponse | list[schemas.TextGenerationResponse],
        responses=_STREAMS,
    )
    async def generate(body: schemas.TextGenerationRequest, request: Request):
        """text-generation-inference's form: what follows a text, or each of a list; with ``stream``, its tokens as events."""
        return await continued(body, request, lambda results: _unnested(results, isinstance(body.inputs, str)))

    async def generate_listed(body: schemas.TextGenerationRequest, request: Request):
        """As ``/generate``, but a list in any case."""
        return await continued(body, request, lambda results: results)

    @app.post(
        "/v1/embeddings",
        response_model=schemas.OpenAIEmbeddingsResponse,
        responses={status: {"model": schemas.OpenAIError} for status in _DESCRIPTIONS},
    )
    async def openai_embeddings(body: schemas.OpenAIEmbeddingsRequest, request: Request):
        """OpenAI's form of ``/embed``."""
        service.check_task("embedding")
        texts, model = _listed(body.input), body.model or service.settings.model
        options = (body.dimensions, body.encoding_format, model)
        return await service.respond(request, len(texts), jobs.openai_embeddings, texts, *options)

    async def embed_or_compare(body: schemas.EmbedRequest | schemas.SimilarityRequest, request: Request):
        """As ``/embed``, or as ``/similarity`` where inputs are a source sentence and others."""
        return await (similarity if isinstance(body, schemas.SimilarityRequest) else embed)(body, request)

    of_task = {
        "question-answering": question_answering,
        "text-classification": text_classification,
        "token-classification": token_classification,
        "embedding": embed_or_compare,
        "fill-mask": fill_mask,
        "translation": translate,
        "text-generation": generate_listed,
    }
    responses = _STREAMS if service.engine.task == "text-generation" else None
    document = {"summary": "The served task, in Hugging Face's form", "response_model": None, "responses": responses}
    app.post("/", **document)(of_task[service.engine.task])


def _handle_errors(app):
    @app.exception_handler(RequestError)
    async def failed(request, error):
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return _error(request, error.status, error.error_type, error.message, headers)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request, error):
        if not _is_json(request.headers.get("content-type", "")):
            return _error(request, 415, "validation", "Content-Type must be application/json")
        first = error.errors()[0]
        if first["type"] == "json_invalid" or (first["type"], first["loc"]) == ("missing", ("body",)):
            return _error(request, 400, "validation", "the body is not JSON")
        return _error(request, 422, "validation", _complaint(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request, error):
        error_type = _OTHER_TYPES.get(error.status_code) or _TYPE_OF_STATUS.get(error.status_code, "validation")
        return _error(request, error.status_code, error_type, error.detail, error.headers)


def _error(request, status, error_type, message, headers=None):
    return JSONResponse(body_of(request.url.path, status, error_type, message), status, headers)


def _complaint(errors):
    """What is wrong with the first field: of a field of several forms, with the form that the body comes closest to."""
    alike = [(_place(error), error["msg"]) for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    place, message = max(alike, key=lambda pair: len(pair[0]))
    return f"{'.'.join(map(str, place)) or 'body'}: {message}"


def _place(error):
    """Where in the body an error is, without pydantic's names of the forms of a union."""
    *parents, last = error["loc"][1:] or [""]
    names = [part for part in parents if not _is_form(part)]
    return [*names, last] if error["type"] == "extra_forbidden" or not _is_form(last) else names


def _is_form(part):
    return isinstance(part, str) and (not part.isidentifier() or part in ("", "str") or hasattr(schemas, part))


def _is_json(content_type):
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _first(answers):
    """The best answer; the empty one where the context holds none."""
    return answers[0] if answers else {"answer": "", "score": 0.0, "start": 0, "end": 0}


def _listed(texts):
    return [texts] if isinstance(texts, str) else texts


def _parts(inputs):
    return (inputs,) if isinstance(inputs, str) else tuple(inputs)


def _truncation(truncate, direction="right"):
    return (direction or "right").lower() if truncate else None


def _unnested(items, alone=True):
    return items[0] if alone and len(items) == 1 else items

"""Bodies of requests and responses: those of text-embeddings-inference, Hugging Face's Inference API and OpenAI."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from roberta_fast.tasks.question_answering import MAX_ANSWER_LENGTH

Direction = Literal["left", "right", "Left", "Right"]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
Single = Annotated[list[str], Field(min_length=1, max_length=1)]
Texts = str | list[str]


class _Body(BaseModel):
    """Of a request: nothing is converted, and a field that is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ErrorResponse(BaseModel):
    error: str
    error_type: str


class OpenAIError(BaseModel):
    message: str
    code: int
    type: str


class QuestionAnsweringParameters(_Body):
    top_k: int = Field(1, ge=1, le=100)
    doc_stride: int | None = Field(None, ge=0, description="tokens that neighbouring windows share; 128 where they fit")
    max_answer_len: int = Field(MAX_ANSWER_LENGTH, ge=1, le=256, description="in tokens")
    max_seq_len: int | None = Field(None, ge=8, description="tokens of a window; 384 where the model takes them")
    max_question_len: int | None = Field(None, ge=1, description="tokens of the question that are kept; all of them by default")
    handle_impossible_answer: bool = False
    align_to_words: bool = True


class Question(_Body):
    question: str
    context: str


class QuestionAnsweringRequest(_Body):
    inputs: Question | list[Question]
    parameters: QuestionAnsweringParameters | None = None


class AnswerResponse(BaseModel):
    answer: str
    score: float
    start: int = Field(description="the character of the context, a Unicode code point, where the answer begins")
    end: int


class TokenClassificationParameters(_Body):
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: list[str] = ["O"]
    stride: int | None = Field(None, ge=0, description="tokens that neighbouring windows of a long text share")


class TokenClassificationRequest(_Body):
    inputs: Texts
    parameters: TokenClassificationParameters | None = None


class EntityResponse(BaseModel):
    entity_group: str | None = None
    entity: str | None = None
    score: float
    word: str
    start: int
    end: int


class TextClassificationParameters(_Body):
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    top_k: int | None = Field(None, ge=1)


class TextClassificationRequest(_Body):
    inputs: Texts
    parameters: TextClassificationParameters | None = None
    truncate: bool = False


class PredictRequest(_Body):
    inputs: str | Pair | list[Single | Pair]
    truncate: bool = False
    truncation_direction: Direction = "right"
    raw_scores: bool = False


class PredictionResponse(BaseModel):
    label: str
    score: float


class EmbedRequest(_Body):
    inputs: Texts
    truncate: bool | None = False
    truncation_direction: Direction | None = "right"
    normalize: bool | None = True
    prompt_name: str | None = None
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float"] | None = "float"


class SimilarityParameters(_Body):
    truncate: bool = False
    truncation_direction: Direction = "right"
    prompt_name: str | None = None


class SimilarityInput(_Body):
    source_sentence: str
    sentences: list[str]


class SimilarityRequest(_Body):
    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None


class RerankRequest(_Body):
    query: str
    texts: list[str]
    truncate: bool = False
    truncation_direction: Direction = "right"
    raw_scores: bool = False
    return_text: bool = False


class RankResponse(BaseModel):
    index: int
    score: float
    text: str | None = None


class FillMaskParameters(_Body):
    top_k: int = Field(5, ge=1, le=100)
    targets: list[str] | None = None


class FillMaskRequest(_Body):
    inputs: Texts
    parameters: FillMaskParameters | None = None


class WordResponse(BaseModel):
    score: float
    token: int
    token_str: str
    sequence: str


class GenerateParameters(_Body):
    max_new_tokens: int | None = Field(None, ge=1)
    num_beams: int | None = Field(None, ge=1, le=8)
    do_sample: bool | None = Field(None, description="by default where a temperature, top_k or top_p is given")
    temperature: float | None = Field(None, ge=0.01, le=100)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63, description="draws the same text again, whatever is asked beside it")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        if self.do_sample is not None:
            return self.do_sample
        return not (self.temperature is self.top_k is self.top_p is None)

    @model_validator(mode="after")
    def _fits(self):
        if self.do_sample is False and not (self.temperature is self.top_k is self.top_p is None):
            raise ValueError("temperature, top_k and top_p are of sampling, and do_sample is false")
        if self.samples and (self.num_beams or 1) > 1:
            raise ValueError("num_beams must be 1 where tokens are sampled")
        return self


class TranslationParameters(GenerateParameters):
    clean_up_tokenization_spaces: bool | None = None
    truncation: Literal["do_not_truncate", "longest_first", "only_first"] | None = None
    generate_parameters: GenerateParameters | None = Field(None, description="in place of those beside it")

    @model_validator(mode="after")
    def _says_once(self):
        if self.generate_parameters is not None and self.model_fields_set & GenerateParameters.model_fields.keys():
            raise ValueError("what generate_parameters holds cannot be given beside it too")
        return self


class TranslationRequest(_Body):
    inputs: Texts
    parameters: TranslationParameters | None = None


class TranslationResponse(BaseModel):
    translation_text: str


class TextGenerationParameters(GenerateParameters):
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=4, description="ends the text, and is in it")
    truncate: int | None = Field(None, ge=1, description="tokens of the input that are kept, its last")
    return_full_text: bool | None = None
    details: bool | None = None
    best_of: Literal[1] | None = None
    decoder_input_details: Literal[False] | None = None
    watermark: Literal[False] | None = None

    @model_validator(mode="after")
    def _fits_beams(self):
        if (self.num_beams or 1) > 1 and (self.stop or self.details):
            raise ValueError("num_beams must be 1 with stop or details")
        return self


class TextGenerationRequest(_Body):
    inputs: Texts
    parameters: TextGenerationParameters | None = None
    stream: bool = False

    @model_validator(mode="after")
    def _fits(self):
        if self.stream and (isinstance(self.inputs, list) or (self.parameters and (self.parameters.num_beams or 1) > 1)):
            raise ValueError("a stream has one text, and num_beams 1")
        return self


class TokenResponse(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool


class TextGenerationDetails(BaseModel):
    finish_reason: Literal["eos_token", "length", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list
    tokens: list[TokenResponse]


class TextGenerationResponse(BaseModel):
    generated_text: str
    details: TextGenerationDetails | None = None


class OpenAIEmbeddingsRequest(_Body):
    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class OpenAIEmbedding(BaseModel):
    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class OpenAIUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddingsResponse(BaseModel):
    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class InfoResponse(BaseModel):
    model_id: str
    model_type: dict
    model_dtype: str
    task: str
    precision: str
    deterministic: bool
    backend: Literal["roberta_fast", "huggingface"]
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_concurrent_requests: int
    max_client_batch_size: int
    max_new_tokens: int
    version: str

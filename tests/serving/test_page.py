"""The page in a real browser: what it shows is what the server answers, and text stays text."""

import json
import shutil

import pytest

pytest.importorskip("selenium", reason="needs selenium")

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SCRIPT = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=900,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    """page(task, texts) shows the served task's page, fills in the texts by their fields' labels, and sends them by keyboard."""

    def run(task, texts):
        browser.get(str(server(task).base_url))
        for label, text in texts.items():
            field = browser.find_element(By.XPATH, f"//label[text()='{label}']/following-sibling::*[1]")
            assert field.get_attribute("id") == browser.find_element(By.XPATH, f"//label[text()='{label}']").get_attribute("for")
            # Keys cannot type what is beyond the first 65536 characters of Unicode.
            browser.execute_script("arguments[0].value = arguments[1]", field, text)
        field.send_keys(Keys.CONTROL, Keys.ENTER)
        WebDriverWait(browser, 30).until(lambda b: b.find_element(By.ID, "result").get_attribute("childElementCount") != "0")
        return browser.find_element(By.ID, "result")

    yield run
    complaints = [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert complaints == [] and browser.title.endswith("roberta_fast")


@pytest.mark.parametrize(
    "context", ["🦀 Marley was dead, 👻 to begin with.", f"Marley {SCRIPT} was dead."], ids=["emoji", "HTML"]
)
def test_the_answer_is_highlighted(page, server, context):
    question = "Who was dead?"
    answer = server("question-answering").post("/question", json={"question": question, "context": context}).json()
    result = page("question-answering", {"Question": question, "Context": context})
    (mark,) = result.find_elements(By.TAG_NAME, "mark")
    assert mark.get_property("textContent") == answer["answer"]
    assert result.find_element(By.CLASS_NAME, "text").get_property("textContent") == context
    assert answer["answer"] in result.find_element(By.CLASS_NAME, "answer").text


def test_entities_are_highlighted(page, server, sentences):
    text = "😀 " + sentences[0] + SCRIPT
    entities = server("token-classification").post("/token-classification", json={"inputs": text}).json()
    result = page("token-classification", {"Text": text})
    marks = [mark.get_property("textContent") for mark in result.find_elements(By.TAG_NAME, "mark")]
    assert marks == [entity["word"] + entity["entity_group"] for entity in entities] and marks


def test_labels_have_bars(page, server):
    labels = server("text-classification").post("/predict", json={"inputs": "A charming journey."}).json()
    result = page("text-classification", {"Text": "A charming journey."})
    meters = [
        (m.get_attribute("aria-label"), float(m.get_attribute("value"))) for m in result.find_elements(By.TAG_NAME, "meter")
    ]
    assert meters == [(label["label"], pytest.approx(label["score"], abs=1e-6)) for label in labels]


def test_sentences_are_compared(page):
    texts = {
        "Sentence": "A man is eating food.",
        "Others to compare with, one a line": "A man is eating a piece of bread.\n\nNo.",
    }
    result = page("embedding", texts)
    assert "75.5 %" in result.text and len(result.find_elements(By.TAG_NAME, "meter")) == 2


def test_masks_are_filled_and_errors_are_told(page, browser):
    assert len(page("fill-mask", {"Text with a mask": "A [MASK] text."}).find_elements(By.TAG_NAME, "meter")) == 5
    alert = page("fill-mask", {"Text with a mask": "no mask"}).find_element(By.CSS_SELECTOR, "[role=alert]")
    assert alert.text.startswith("422: a text must hold 1 to 16 times [MASK], got 0")
    # The browser itself notes every failed request.
    assert all("422" in entry["message"] or "favicon" in entry["message"] for entry in browser.get_log("browser"))


def test_texts_are_translated_and_continued(page, server):
    (translation,) = server("translation").post("/translate", json={"inputs": "Old Marley 👻"}).json()
    shown = page("translation", {"Text": "Old Marley 👻"}).find_element(By.CLASS_NAME, "answer").get_property("textContent")
    assert shown == translation["translation_text"] != ""
    whole = server("text-generation").post("/generate", json={"inputs": SCRIPT}).json()["generated_text"]
    result = page("text-generation", {"Beginning": SCRIPT})
    # An element may be replaced by the next token's while it is read.
    wait = WebDriverWait(result, 30, ignored_exceptions=[StaleElementReferenceException])
    wait.until(lambda r: r.find_element(By.TAG_NAME, "mark").get_property("textContent") == whole)
    assert result.get_property("textContent") == SCRIPT + whole


def test_nothing_comes_from_elsewhere(page, browser):
    page("text-classification", {"Text": "A charming journey."})
    loaded = json.loads(
        browser.execute_script("return JSON.stringify(performance.getEntriesByType('resource').map(e => e.name))")
    )
    assert loaded and all(name.startswith(browser.current_url) for name in loaded)


def test_the_keyboard_reaches_everything(page, browser):
    page("question-answering", {"Question": "Who?", "Context": "Marley."})
    browser.find_element(By.TAG_NAME, "body").click()
    browser.execute_script("document.getElementById('question').focus()")
    reached = []
    for _ in range(4):
        reached.append(
            browser.switch_to.active_element.get_attribute("id") or browser.switch_to.active_element.get_attribute("class")
        )
        browser.switch_to.active_element.send_keys(Keys.TAB)
    assert reached == ["question", "context", "send", "text"], "the result too, as it may scroll"

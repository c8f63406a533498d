"""The page's look and operation: its order, its windows, keys and fingers."""

import re
from importlib import resources
from io import BytesIO
from urllib.parse import urljoin

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from minigpt4.config import MODELS
from tests import fake_engine
from tests.fake_engine import FORMULAS
from tests.page_case import (
    PHONE,
    WIDE,
    answers,
    ask,
    attach,
    box,
    done,
    figures,
    inside,
    open_settings,
    picture,
    questions,
    say,
    status,
)
from tests.running import wait_for

PASTE = """(text) => {
    const clipboardData = new DataTransfer();
    clipboardData.setData("text/plain", text);
    document.querySelector("#box textarea").dispatchEvent(
        new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
    setTimeout(() => { window.pasted = true; }, 300);
}"""
MARKDOWN = r"""The area
is $\pi r^2$.

- one
  - two
    - three
- [x] done
- [ ] open

~~~python
print("<b>")
~~~

| Internationalization | Extraordinarily | Supercalifragilistic |
|---|---|---|
| 1 | 2 | 3 |

- שלום
"""
LARGE = {"viewport": {"width": 1440, "height": 900}}
TYPED = [
    "What is 2*3*4?",
    r"Where is C:\new\_dir_?",
    "1. first",
    "# title",
    "- item",
    "a  b\n\n<b> & &#42;",
]
# The focused element, and whether it, its label or the composer around it is outlined.
FOCUS = """() => {
  const focused = document.activeElement;
  const ringed = [focused, focused.closest("label"), focused.closest("#composer .full-container")];
  const seen = ringed.filter(Boolean).some((element) => {
    const { outlineStyle, outlineWidth } = getComputedStyle(element);
    return outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
  });
  return [focused.outerHTML.slice(0, 160), seen || focused === document.body];
}"""
SUN = (0.7, 0.07), (0.9, 0.07 + 0.2 * 4 / 3)  # two corners around it, as shares of the picture
# A picture's width, height, and the colour in its middle.
MIDDLE = """async (image) => {
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [width, height, ...context.getImageData(width / 2, height / 2, 1, 1).data];
}"""
KEPT_SIZES = """async () => Promise.all((await (await minigpt4.store).all("pictures"))
  .filter(({ blob }) => blob).map(async ({ blob }) => {
    const { width, height } = await createImageBitmap(blob);
    return [width, height];
  }))"""
FRAME_AND_BUTTON = ("full-container", "submit-button")
SHIFT = """(since) => new Promise((resolve) => {
  let sum = 0;
  const unasked = (e) => e.startTime > since && !e.hadRecentInput;
  const add = (entries) => entries.forEach((e) => { if (unasked(e)) sum += e.value; });
  new PerformanceObserver((list) => add(list.getEntries())).observe(
    { type: 'layout-shift', buffered: true });
  setTimeout(() => resolve(sum), 300);
})"""


def test_what_is_typed_is_shown_as_typed(visit):
    page = visit()
    for count, text in enumerate(TYPED, 1):
        box(page).fill(text)
        box(page).press("Enter")
        expect(answers(page)).to_have_count(count)
        done(page)
        shown = questions(page).last.inner_text()
        assert re.sub(r"\n+", "\n", shown.strip()) == re.sub(r"\n+", "\n", text)
    page.get_by_role("button", name="Edit").last.click()
    expect(page.locator("#chat textarea")).to_have_value(TYPED[-1])


def test_formulas_but_no_amounts_of_money(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Show me formulas.")
    expect(answers(page).locator(".katex")).to_have_count(3)
    expect(answers(page)).to_contain_text("It costs $5 or $10.")
    expect(answers(page).locator("code")).to_have_text("$x$")
    page.locator("#chat").get_by_label("Copy message").last.click()
    wait_for(lambda: page.evaluate("navigator.clipboard.readText()") == FORMULAS)


def test_an_answer_in_markdown(visit, monkeypatch):
    monkeypatch.setattr(fake_engine, "answer_to", lambda *_: MARKDOWN)
    page = visit(**PHONE)
    ask(page, "Show me all.")
    shown = answers(page).locator(".md")
    expect(shown.locator(".katex")).to_have_count(1)
    # A table scrolls; no word in it is broken.
    table = shown.locator("table")
    assert table.evaluate("table => table.scrollWidth > table.clientWidth")
    lines = "cell => cell.clientHeight < 2 * parseFloat(getComputedStyle(cell).lineHeight)"
    assert table.locator("th").first.evaluate(lines)
    # Nested lists are as large as the text, and a list has its markers at the side where it begins.
    style = "(found, name) => getComputedStyle(found)[name]"
    sizes = [item.evaluate(style, "fontSize") for item in shown.locator("li, p").all()]
    assert len(sizes) == 7 and len(set(sizes)) == 1
    assert shown.locator("ul").first.evaluate(style, "listStyleType") == "disc"
    gap = "part => part.getBoundingClientRect().top - "
    gap += "part.previousElementSibling.getBoundingClientRect().bottom"
    code, table_after = shown.locator("> .code_wrap, > table").all()
    assert code.evaluate(gap) == table_after.evaluate(gap) >= 12
    assert shown.locator("ul").last.evaluate(style, "paddingRight") != "0px"
    ticked, open_ = (box.evaluate(style, "backgroundColor") for box in shown.locator("input").all())
    assert ticked != open_
    # Read aloud are neither code nor a formula's parts.
    page.evaluate("void (speechSynthesis.speak = ({ text }) => { window.said = text })")
    page.get_by_role("button", name="Read aloud").click()
    said = page.evaluate("said")
    assert re.search(r"The area\nis \\pi r\^2\.\n", said)
    assert said.count("r^2") == 1 and "print" not in said and "done" in said


def test_a_first_look_names_the_picture_and_the_conversation(visit, photo):
    page = visit(**WIDE)
    tiff = photo.with_suffix(".tiff")  # which Chromium does not show: the server's copy is
    Image.open(photo).save(tiff)
    attach(page, tiff)
    expect(page.locator("#box img")).to_have_attribute("alt", "A red house beside a lake")
    wait_for(lambda: page.locator("#box img").evaluate("image => image.naturalWidth") == 320)
    expect(page.locator("#box .blank")).to_have_count(0)
    ask(page, "Describe this image in detail.")
    name = "Picture 1 of 1: meadow.tiff. A red house beside a lake"
    expect(page.locator("#chat .image-frame img")).to_have_attribute("alt", name)
    expect(page.locator("#conversations li")).to_contain_text("A red house beside a lake")


def test_an_answer_shows_where(visit, photo, engine, monkeypatch):
    monkeypatch.setattr(engine.model, "config", MODELS["mini"])
    page = visit(**WIDE)
    attach(page, photo)
    ask(page, "Describe it.")
    word, outline = page.locator(".seen"), page.locator(".where i")
    expect(word).to_have_text("boat")
    word.hover()
    expect(outline).to_have_count(1)
    inside, whole = outline.bounding_box(), page.locator("#chat .image-frame img").bounding_box()
    assert abs(inside["x"] + inside["width"] / 2 - whole["x"] - whole["width"] / 2) < 2
    assert abs(inside["y"] + inside["height"] / 2 - whole["y"] - whole["height"] * 0.75) < 2
    box(page).hover()
    expect(outline).to_have_count(0)
    word.focus()
    expect(outline).to_have_count(1)
    page.get_by_role("button", name="Enlarge").click()
    expect(outline).to_have_count(0)
    page.get_by_role("button", name="boat", exact=True).click()
    expect(page.locator("#lightbox .where i")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(outline).to_have_count(0)
    page.set_viewport_size({"width": 390, "height": 380})  # too low for picture and word
    page.locator("#chat .bubble-wrap").evaluate("chat => chat.scrollTo(0, 1e6)")
    expect(page.locator("#chat .image-frame img")).not_to_be_in_viewport()
    word.click()
    expect(outline).to_be_in_viewport()


def test_a_part_of_a_picture_is_asked_about(visit, photo):
    Image.open(photo).resize((2000, 1500)).save(photo)
    page = visit(has_touch=True, **WIDE)
    thumbnails, frame = page.locator("#box .thumbnail-image"), page.locator("#crop .region")
    attach(page, photo)

    crop = page.locator("#box").get_by_role("button", name="Crop")  # by mouse: the sun
    crop.click()
    expect(frame).to_be_focused()
    edge = page.locator("#crop .stage").bounding_box()
    across = [(edge["x"] + edge["width"] * x, edge["y"] + edge["height"] * y) for x, y in SUN]
    page.mouse.move(*across[0])
    page.mouse.down()
    page.mouse.move(*across[1])
    page.mouse.up()
    page.get_by_role("button", name="Ask about this part").click()
    expect(thumbnails).to_have_count(2)
    expect(box(page)).to_be_focused()
    width, height, *colour = thumbnails.last.evaluate(MIDDLE)
    assert abs(width - 400) < 15 and abs(height - 400) < 15
    assert colour[:2] > [240, 200] and colour[2] < 30  # gold

    crop.first.click()  # Escape leaves all as it was
    page.keyboard.press("Escape")
    expect(crop.first).to_be_focused()
    expect(thumbnails).to_have_count(2)
    ask(page, "Count them.")
    expect(answers(page)).to_have_text("I see 2 pictures.")
    wait_for(lambda: [1024, 768] in page.evaluate(KEPT_SIZES))  # of 2,000 x 1,500

    # By keyboard, from the large view, which is smaller than the file.
    page.get_by_role("button", name="Enlarge: Picture 1 of 2").click()
    page.get_by_role("dialog", name="Picture 1 of 2").get_by_role("button", name="Crop").click()
    expect(frame).to_be_focused()  # not before the large picture has been loaded
    for key in ("Shift+ArrowLeft", "Shift+ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    place = "25 % from the left, 27 % from the top, 48 % wide, 48 % high"
    expect(page.locator("#crop [role=status]")).to_have_text(place)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(thumbnails).to_have_count(1)
    assert thumbnails.evaluate(MIDDLE)[:2] == [960, 720]

    page.set_viewport_size({"width": 844, "height": 390})  # a phone on its side
    crop.click()  # by touch: the frame is moved to the right edge
    before = frame.bounding_box()
    start = (before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    fingers = page.context.new_cdp_session(page)
    for kind, step in (("touchStart", 0), ("touchMove", 2000)):
        point = {"x": start[0] + step, "y": start[1]}
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
    fingers.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect(page.locator("#crop [role=status]")).to_have_text(re.compile("^50 % .* 50 % wide"))


def test_a_picture_that_is_still_loading_is_cropped_once(visit, photo):
    page = visit(**WIDE)
    held = []
    page.route("**/file=**/meadow.png", lambda route: held.append(route))
    attach(page, photo)
    crop = page.locator("#box").get_by_role("button", name="Crop")
    crop.click()
    crop.click()
    assert held
    page.unroute("**/file=**/meadow.png")  # which lets it go on
    expect(page.locator("#crop .region")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_picture_that_is_turned_away_while_it_loads_is_not_cropped(visit):
    page = visit(**WIDE)
    page.route("**/slow.png", lambda route: route.abort())
    page.evaluate(
        """async () => {
            const canvas = document.createElement("canvas"), shown = new Image();
            shown.src = "/slow.png";
            const cropped = minigpt4.crop(shown);
            shown.src = canvas.toDataURL();
            await Promise.all([cropped, shown.decode()]);
        }"""
    )
    expect(page.locator("#crop, .notice")).to_have_count(0)
    visit.expected("ERR_FAILED")


def test_shortcuts_and_their_list(visit):
    page = visit(**WIDE)
    ask(page, "Say it again.")
    page.get_by_role("button", name="About this answer").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_contain_text("New chat")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="About this answer")).to_be_focused()
    page.keyboard.press("/")
    expect(box(page)).to_be_focused()
    page.keyboard.type("?/")
    expect(box(page)).to_have_value("?/")
    box(page).fill("")
    page.keyboard.press("ArrowUp")
    edited = page.locator("#chat textarea")
    expect(edited).to_be_focused()
    assert edited.bounding_box()["width"] > 0.9 * answers(page).bounding_box()["width"]
    edges = page.locator("#chat .message:has(textarea)")
    for name in ("Send", "Cancel"):
        assert inside(page.locator("#chat").get_by_role("button", name=name), edges)
    page.keyboard.press("Escape")
    expect(edited).to_have_count(0)
    expect(box(page)).to_be_focused()
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Control+Shift+O")
    expect(answers(page)).to_have_count(0)
    expect(box(page)).to_be_focused()


def test_an_answer_is_read_aloud(visit):
    page = visit(**WIDE)
    ask(page, "Say it again.")
    # Where there is no loudspeaker, nothing is said: what would be is noted instead.
    page.evaluate(
        "void (speechSynthesis.speak = ({ text, lang }) => { window.said = [text.trim(), lang] })"
    )
    read = page.get_by_role("button", name="Read aloud")
    read.click()
    expect(read).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("said") == [answers(page).inner_text().strip(), "en"]
    read.click()
    expect(read).to_have_attribute("aria-pressed", "false")


def test_the_rail_is_drawn_before_any_script_is_loaded(browser, address):
    """In the colours that the visitor chose, and not beneath the rail itself."""
    page = browser.new_context(**WIDE, color_scheme="light").new_page()
    page.add_init_script("localStorage.setItem('minigpt4:theme', 'dark')")
    drawn = "getComputedStyle(document.body, '::before')"
    held = []
    page.route("**/assets/index-*.js", lambda route: held.append(route))
    page.goto(address, wait_until="commit")
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint')[0]")
    assert page.evaluate(f"{drawn}.content") == '"MiniGPT-4"'
    assert page.evaluate(f"{drawn}.backgroundColor") == "rgb(20, 20, 18)"
    assert held and not page.locator("#rail").count()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        name = page.screenshot(clip={"x": 50, "y": 10, "width": 100, "height": 40})
        assert len(Image.open(BytesIO(name)).convert("RGB").getcolors()) > 5  # it can be seen
    for route in held:
        route.continue_()
    expect(box(page)).to_be_visible()
    assert page.evaluate(f"{drawn}.display") == "none"
    page.context.close()


def test_it_can_be_installed(visit):
    page = visit()
    link = page.locator("link[rel=manifest]")
    root = page.evaluate("gradio_config.root")  # with --root-path; the page's may lack its slash
    expect(link).to_have_attribute("href", f"{root}/manifest.json")
    manifest = link.evaluate("e => e.href")
    told = page.request.get(manifest).json()
    assert told["name"] == "MiniGPT-4" and told["display"] == "standalone"
    assert told["theme_color"] == told["background_color"] == "#faf9f7"
    for icon in told["icons"]:
        assert page.request.get(urljoin(manifest, icon["src"])).ok


def test_names_and_roles_are_attributes(visit):
    """Firefox ESR 115 has no properties for them."""
    made = visit().evaluate("""() => {
      for (const name of Object.getOwnPropertyNames(Element.prototype)) {
        if (/^(role|aria[A-Z])/.test(name)) delete Element.prototype[name];
      }
      const values = { role: "status", ariaLabel: "a", ariaHidden: undefined, id: "b" };
      return minigpt4.make("p", values).outerHTML;
    }""")
    assert made == '<p role="status" aria-label="a" id="b"></p>'
    for script in (resources.files("minigpt4") / "web/page/assets").iterdir():
        if script.name.endswith(".js"):
            assert not re.search(r"\.aria[A-Z]\w+|assign\(.*aria[A-Z]", script.read_text("utf-8"))


def test_a_note_for_those_whose_language_the_model_does_not_speak(visit, photo):
    note = "Dieses Modell versteht und spricht nur Englisch."
    page = visit(locale="de-DE")
    expect(page.locator("#note")).to_contain_text(note)
    attach(page, photo)
    expect(page.locator("#status")).to_have_text("Bereit: Stellen Sie Ihre Frage.")
    expect(page.locator("#note")).to_contain_text(note)  # until the question is sent
    expect(visit().locator("#note")).to_have_text("Answers can be wrong.")


def test_the_message_box_stays_where_it_is(visit, engine):
    """From the question to the answer's end, although lines come and go below the box."""
    page = visit(locale="de-DE", **PHONE)
    expect(status(page).locator("[role=status]")).to_be_attached()
    ask(page, "Hello?")
    expect(status(page)).to_have_text("In diesem Chat ist kein Bild. Fügen Sie mit + eines hinzu.")
    note, composer = page.locator("#note"), page.locator("#composer")
    expect(note).to_be_hidden()  # the status takes its place
    engine.word_seconds = 0.05
    before = composer.bounding_box()
    say(page, "A long one, please.")
    expect(answers(page).last).to_contain_text("word3")
    assert composer.bounding_box() == before
    box(page).press("Escape")
    done(page)
    engine.word_seconds = 0.003
    ask(page, "And a short one?")
    expect(note).to_be_visible()
    assert composer.bounding_box() == before
    # Screen readers read a status only if its element was there, in sight, before.
    assert status(page).evaluate("e => e.checkVisibility({ visibilityProperty: true })")
    page.evaluate("minigpt4.notice('Here')")
    edge = page.locator(".notice").bounding_box()
    assert before["y"] - 20 <= edge["y"] + edge["height"] <= before["y"] - 10


def test_notices_are_read_aloud(visit):
    page = visit()
    region = page.locator("body > [role=status]")
    expect(region).to_have_text("")  # it is there before the first notice
    page.evaluate("minigpt4.notice('Here')")
    expect(region).to_have_text("Here")


def test_the_arrow_down_lies_below_notices(visit):
    page = visit(viewport={"width": 390, "height": 420})
    ask(page, "A long one, please.")
    down = page.get_by_role("button", name="Scroll down")

    page.locator("#chat .bubble-wrap").hover()

    def scrolled() -> bool:
        page.mouse.wheel(0, -20)
        return down.is_visible()

    wait_for(scrolled)
    edge = down.bounding_box()
    middle = [edge["x"] + edge["width"] / 2, edge["y"] + edge["height"] / 2]
    page.evaluate("minigpt4.notice('words '.repeat(20))")
    at = "([x, y]) => Boolean(document.elementFromPoint(x, y).closest('.notice'))"
    assert page.evaluate(at, middle)


def test_notices_stand_above_the_message(visit, engine, photo):
    page = visit()
    attach(page, photo)
    box(page).fill("Several\nlines\nof\ntext")
    engine.full = True
    say(page, "Is anyone there?")
    notice = page.get_by_test_id("toast-body")
    expect(notice.get_by_text("Too many people are waiting")).to_be_visible()
    expect(notice.get_by_text("Warning")).to_be_hidden()
    edge = notice.bounding_box()
    assert edge["y"] + edge["height"] < page.locator("#composer").bounding_box()["y"]
    assert edge["height"] < 80


def test_a_message_that_cannot_be_sent_yet(visit, photo):
    page = visit()
    send = page.get_by_label("Send", exact=True)
    expect(send).to_be_disabled()
    box(page).fill("  ")
    expect(send).to_be_disabled()
    box(page).fill("Hello?")
    expect(send).to_be_enabled()
    box(page).fill("")
    expect(send).to_be_disabled()
    attach(page, photo)
    expect(send).to_be_enabled()


def test_who_scrolls_up_stays_there(visit, engine):
    """Until the end is reached again. A pasted text stays text, however long it is."""
    page = visit(viewport={"width": 900, "height": 420})
    page.evaluate(PASTE, "long " * 25_000)
    page.wait_for_function("window.pasted")
    expect(page.locator("#box .thumbnail-wrapper, #box .file-icon")).to_have_count(0)
    engine.word_seconds = 0.02
    say(page, "A long one")
    shown = page.locator("#chat .bubble-wrap")
    rest = "(wrap) => wrap.scrollHeight - wrap.clientHeight - wrap.scrollTop"
    wait_for(lambda: shown.evaluate("(wrap) => wrap.scrollTop") > 200)
    shown.hover()
    page.mouse.wheel(0, -150)
    wait_for(lambda: shown.evaluate(rest) > 250)  # the answer grows below
    page.mouse.wheel(0, 5000)
    wait_for(lambda: shown.evaluate(rest) < 40)
    done(page)
    engine.word_seconds = 0.003
    page.mouse.wheel(0, -150)
    wait_for(lambda: shown.evaluate(rest) > 40)
    ask(page, "And a short one?")
    wait_for(lambda: shown.evaluate(rest) < 40)


def test_the_wait_is_shown_from_the_moment_of_sending(visit, engine):
    engine.ahead = 1
    page = visit()
    say(page, "Hello?")
    dots = """() => [["#composer", "::before"], ["#chat .message-wrap", "::after"]].filter(
        ([part, where]) => {
            const shown = document.querySelector(part);
            const style = shown && getComputedStyle(shown, where);
            return style && style.content !== "none" && style.display !== "none";
        }).map(([part]) => part)"""
    assert page.evaluate("document.documentElement.hasAttribute('data-sending')")
    expect(status(page)).to_have_text("You are next.")
    assert page.evaluate(dots) == ["#chat .message-wrap"]  # until the first word
    engine.ahead, engine.word_seconds = 0, 0.05
    expect(answers(page)).to_contain_text("The red")
    assert page.evaluate(dots) == []
    page.evaluate(  # nor at its end
        f"""() => {{
            window.late = [];
            new MutationObserver(() => window.late.push(...({dots})()))
                .observe(document.body, {{ childList: true, subtree: true }});
        }}"""
    )
    buttons = page.locator("#chat .message-buttons-left")
    expect(buttons).to_be_hidden()  # each line would move them
    done(page)
    assert page.evaluate("window.late") == []
    expect(buttons).to_be_visible()


def test_pictures_are_one_grid_with_names_and_a_window(visit, tmp_path):
    page = visit(**WIDE)
    skies = {"dog.png": "skyblue", "cat.png": "navy", "cow.png": "pink"}
    attach(page, *(picture(tmp_path / name, sky) for name, sky in skies.items()))
    for side in ("width", "height"):
        thumbnail = page.locator("#box .thumbnail-wrapper img").first
        assert thumbnail.bounding_box()[side] == 72
    ask(page, "Count them.")
    pictures = page.locator("#chat .image-frame img")
    expect(pictures).to_have_count(3)
    assert pictures.last.bounding_box()["y"] == pictures.first.bounding_box()["y"]
    bubble = page.locator("#chat .user-row .message:not(.component)")
    colour = bubble.evaluate("e => getComputedStyle(e).backgroundColor")
    for tile in page.locator("#chat .component").all():  # seen until its picture has come
        expect(tile).to_have_css("background-color", colour)
    expect(page.get_by_role("group", name="You")).to_have_count(1)  # for screen readers
    expect(page.locator("#chat [role=log]")).to_match_aria_snapshot(
        """
        - group "You":
          - button /Picture 1 of 3/
          - button /Picture 2 of 3/
          - button /Picture 3 of 3/
          - paragraph: Count them.
        - button "Copy message"
        """
    )
    expect(page.get_by_role("button", name=re.compile("full.?screen", re.I))).to_have_count(0)
    first, second = (pictures.nth(place).bounding_box() for place in (0, 1))
    assert first["y"] == second["y"] and first["x"] < second["x"]

    opener = page.get_by_role("button", name="Enlarge: Picture 2 of 3: cat.png")
    opener.click()
    window = page.get_by_role("dialog", name="Picture 2 of 3: cat.png")
    expect(window).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("dialog", name="Picture 3 of 3: cow.png")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("dialog", name="Picture 1 of 3: dog.png")).to_be_visible()
    swipe = """(window, [x, y]) => {
      const at = (x, y) => [new Touch({ identifier: 1, target: window, clientX: x, clientY: y })];
      window.dispatchEvent(new TouchEvent("touchstart", { touches: at(200, 200) }));
      window.dispatchEvent(new TouchEvent("touchend", { changedTouches: at(200 + x, 200 + y) }));
      return window.ariaLabel;
    }"""
    window = page.locator("#lightbox")
    turned = [window.evaluate(swipe, by) for by in ([-90, 20], [90, -20], [90, 90], [-20, 0])]
    assert [name.split(":")[0][8] for name in turned] == ["2", "1", "1", "1"]
    page.keyboard.press("Escape")
    expect(page.locator("#lightbox")).to_have_count(0)
    expect(opener).to_be_focused()
    page.set_viewport_size({"width": 320, "height": 180})  # as at a large zoom
    opener.click()
    caption = page.locator("#lightbox p").bounding_box()
    arrow = page.get_by_role("button", name="Next picture").bounding_box()
    assert arrow["y"] + arrow["height"] <= caption["y"]


def test_the_list_on_a_phone(visit):
    page = visit(**PHONE)
    ask(page, "Hello?")
    menu = page.get_by_role("button", name="Conversations")
    expect(menu).to_have_attribute("aria-expanded", "false")
    expect(page.locator("#conversations .title")).to_be_hidden()
    menu.click()
    expect(menu).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(menu).to_be_focused()
    menu.evaluate(
        "menu => { menu.click();"
        " menu.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', bubbles: true })); }"
    )
    page.wait_for_timeout(150)  # what is closed at once does not take the focus later
    expect(menu).to_be_focused()
    menu.click()
    page.locator("#conversations .title").click()
    expect(page.locator("#conversations .title")).to_be_hidden()  # the conversation is in view
    expect(answers(page)).to_have_count(1)
    expect(answers(page)).to_be_in_viewport()
    page.set_viewport_size({"width": 320, "height": 256})  # as at 400 % zoom
    menu.click()
    assert page.locator("#conversations").evaluate("e => e.scrollHeight <= e.clientHeight + 1")
    page.get_by_role("button", name="Settings").last.scroll_into_view_if_needed()
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    menu.click()
    page.go_back()  # what it leads to is in view
    expect(page.locator("#conversations .title")).to_be_hidden()
    expect(answers(page)).to_have_count(1)


@pytest.mark.parametrize("width", [1440, 1024])
def test_settings_are_closed_at_first_and_give_the_focus_back(visit, width):
    page = visit(viewport={"width": width, "height": 768})
    gear = page.locator("#foot").get_by_role("button", name="Settings", include_hidden=True)
    expect(gear).to_have_attribute("aria-expanded", "false")
    expect(page.get_by_label("precise")).to_be_hidden()
    gear.press("Enter")
    expect(gear).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_label("balanced")).to_be_visible()  # what is hidden takes no focus
    page.wait_for_function(  # nothing lies over the message box
        """() => document.querySelector("#composer").getBoundingClientRect().right
            <= document.querySelector("#settings").offsetLeft"""
    )
    advanced = page.get_by_role("button", name="Advanced", exact=True)
    for opened in ("false", "true", "false"):
        expect(advanced).to_have_attribute("aria-expanded", opened)
        advanced.click()
    fields = page.locator("#settings input[type=number]")
    assert len({field.evaluate("e => e.offsetWidth") for field in fields.all()}) == 1
    page.get_by_label("balanced").focus()
    page.keyboard.press("ArrowDown")  # one group: arrows go through it
    expect(page.get_by_label("creative")).to_be_checked()
    page.keyboard.press("Escape")
    expect(page.get_by_label("precise")).to_be_hidden()
    expect(gear).to_be_focused()


def test_the_focus_is_never_lost(visit):
    page = visit(**WIDE)
    ask(page, "Say it again.")
    page.get_by_role("button", name="Retry").press("Enter")
    done(page)
    assert page.evaluate("document.activeElement !== document.body")
    page.get_by_label("Delete: Say it again.").press("Enter")
    expect(page.locator("#conversations li")).to_have_count(0)
    expect(box(page)).to_be_focused()


def test_the_focus_is_always_seen(visit):
    page = visit(**WIDE)
    ask(page, "Say it again.")
    for opened in (False, True):
        if opened:
            open_settings(page)
        seen = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            name, outlined = page.evaluate(FOCUS)
            assert outlined, name
            seen.add(name)
        assert len(seen) > 8, seen


@pytest.mark.parametrize("state", ["empty", "chat", "settings", "list"])
def test_fingers_hit_what_they_mean(visit, photo, state):
    page = visit(has_touch=True, **PHONE)
    if state != "empty":
        attach(page, photo)
        ask(page, "Make a website of it." if state == "chat" else "Hello?")
    if state == "chat":
        figures(page)
        page.get_by_role("button", name="Dislike", exact=True).click()
        expect(page.get_by_label("Why? (optional)")).to_be_visible()
        attach(page, photo, picture(photo.with_name("b.png"), "navy"))
    if state == "settings":
        open_settings(page)
    if state == "list":
        page.evaluate("document.querySelector('#new-chat').click()")
        expect(answers(page)).to_have_count(0)
        ask(page, "And now?")
        page.get_by_role("button", name="Conversations").click()
    page.wait_for_timeout(300)
    assert too_small(page) == []
    if state == "list":  # what was deleted there is brought back there
        row = page.locator("#conversations li").last
        height = row.bounding_box()["height"]
        page.get_by_label("Rename: Hello?").click()
        expect(row.get_by_role("button")).to_have_count(0)  # the name has the whole row
        assert row.bounding_box()["height"] == height
        page.keyboard.press("Escape")
        page.get_by_label("Delete: Hello?").click()
        page.get_by_role("button", name="Undo", exact=True).last.click()
        expect(page.get_by_label("Delete: Hello?")).to_be_visible()
    if state == "empty":
        page.set_viewport_size({"width": 320, "height": 640})
        drop, take = page.locator(".drop").bounding_box(), page.locator(".take").bounding_box()
        assert take["x"] + take["width"] <= drop["x"] + drop["width"]


def too_small(page: Page) -> list:
    """What is to be touched, and with all that counts as it has less than 40 pixels."""
    return page.evaluate(
        """() => [...document.querySelectorAll("button, summary, [role=button]")].filter(button => {
            const { x, y, width, height } = button.getBoundingClientRect();
            const hit = [[-19, -19], [19, -19], [-19, 19], [19, 19]].every(([right, down]) =>
                document.elementFromPoint(x + width / 2 + right, y + height / 2 + down) === button);
            return button.checkVisibility({ visibilityProperty: true, opacityProperty: true })
                && width && (width < 40 || height < 40) && !hit;
        }).map((button) => button.outerHTML.slice(0, 120))"""
    )


@pytest.mark.parametrize("size", [LARGE, PHONE], ids=["large", "phone"])
def test_nothing_jumps(visit, photo, size):
    page = visit(**size)
    page.wait_for_timeout(500)
    assert page.evaluate(SHIFT, 0) < 0.05
    attach(page, photo)
    say(page, "A long one, please.")
    expect(answers(page)).to_have_count(1)
    # From here on: before, the message box moves down, which on a busy machine counts as unasked.
    expect(page.locator("#box .thumbnail-item")).to_have_count(0)
    page.wait_for_timeout(200)
    sent = page.evaluate("performance.now()")
    done(page)
    assert page.evaluate(SHIFT, sent) < 0.05
    page.reload()
    expect(answers(page)).to_contain_text("word")
    page.wait_for_timeout(500)
    assert page.evaluate(SHIFT, 0) < 0.05
    visit.expected("AbortError|Connection errored out")


def test_the_column(visit):
    page = visit(**LARGE)
    ask(page, "A long one, please.")
    for part in (answers(page), page.locator("#composer")):
        assert part.bounding_box()["width"] <= 46 * 16
    assert answers(page).evaluate("e => getComputedStyle(e.parentElement).borderTopWidth") == "0px"
    row, settings = (page.locator(s).bounding_box() for s in ("#conversations li", "#foot .line"))
    assert (row["x"], row["width"]) == (settings["x"], settings["width"])
    page.locator("#conversations .all").evaluate("all => { all.hidden = false; }")
    assert page.locator("#conversations .all").bounding_box()["x"] == settings["x"]
    expect(page.locator("#conversations li .blank")).to_have_attribute("data-icon", "chat")
    frame, send = (page.locator(f"#box .{s}").bounding_box() for s in FRAME_AND_BUTTON)
    assert abs(frame["y"] + frame["height"] / 2 - send["y"] - send["height"] / 2) < 1
    muted = page.locator("#note").evaluate("e => getComputedStyle(e).color")
    for icon in ("#add .icon", "#head .end .icon"):
        expect(page.locator(icon).first).to_have_css("color", muted)
    page.emulate_media(forced_colors="active")  # Windows' high contrast: icons are still seen
    ground = "(part, before) => getComputedStyle(part, before).backgroundColor"
    for part in ("#new-chat", "#foot button", "#box .submit-button"):
        assert page.locator(part).evaluate(ground, "::before") != page.locator("body").evaluate(
            ground
        )
    style = "(part, [before, name]) => getComputedStyle(part, before)[name]"
    for part in ("#box .submit-button", "#hello .choose"):  # and buttons have an edge
        assert page.locator(part).evaluate(style, ["", "borderTopWidth"]) == "1px"
    assert page.locator("#presets input").first.evaluate(style, ["", "appearance"]) == "auto"
    page.emulate_media(forced_colors="none", reduced_motion="reduce")
    page.evaluate("minigpt4.sending(true)")
    dots = page.locator("#composer")
    assert dots.evaluate(style, ["::before", "width"]) == "31px"
    assert dots.evaluate(style, ["::before", "animationName"]) == "none"
    page.evaluate("document.documentElement.style.fontSize = '48px'")  # a very large type
    assert page.locator("#rail").bounding_box()["width"] <= 0.3 * 1440


def test_the_symbols_of_a_message_are_of_one_kind(visit):
    page = visit(**WIDE)
    ask(page, "Say it again.")
    symbol = """(button) => {
        const { maskImage, width, height } = getComputedStyle(button, "::before");
        return [maskImage.match(/stroke-width=.*/)[0], width, height];
    }"""
    buttons = page.locator("#chat .message-buttons button:not([aria-label=Share])")
    symbols = [button.evaluate(symbol) for button in buttons.all()]
    assert len(symbols) == 9  # two below the question, seven below the answer
    assert {(*size,) for _, *size in symbols} == {("17px", "17px")}
    drawn = [mask for mask, *_ in symbols]
    assert len({*drawn}) == 7  # both can be copied; "Dislike" is "Like" turned over
    assert all('stroke-width="1.75"' in mask.replace("\\", "") for mask in drawn)
    expect(figures(page).locator("dl > div")).to_have_count(5)  # no number without its name
    page.locator("#chat").get_by_role("button", name="Like", exact=True).click()
    liked = page.locator("#chat").get_by_role("button", name="Liked")
    assert "fill=" in liked.evaluate(symbol)[0]


def test_the_box_is_emptied_on_a_busy_computer(visit, photo, engine):
    """The browser gets all of a short turn's updates at once."""
    page = visit()
    engine.word_seconds = 0
    attach(page, photo)
    say(page, "Hello?")
    page.evaluate("() => { for (const end = Date.now() + 1500; Date.now() < end;); }")
    done(page)
    expect(box(page)).to_have_value("")
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(0)


@pytest.mark.parametrize("width, height", [(1440, 900), (1024, 768), (390, 844), (844, 390)])
def test_every_state_fits_every_screen(visit, photo, width, height):
    page = visit(viewport={"width": width, "height": height})

    def fits() -> None:
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.scrollingElement.scrollHeight <= innerHeight")
        edge = page.locator("#composer").bounding_box()
        assert edge["x"] >= 0 and edge["x"] + edge["width"] <= width
        assert edge["y"] + edge["height"] <= height

    fits()
    attach(page, photo)
    fits()
    page.locator("#add button").first.click()
    menu, thumbnail = page.locator("#add .menu"), page.locator("#box .thumbnail-wrapper")
    assert inside(menu, page.locator("#main"))
    edge = menu.bounding_box()
    assert edge["y"] + edge["height"] <= thumbnail.bounding_box()["y"]
    page.keyboard.press("Escape")
    ask(page, "Hello?")
    fits()
    column, box = (page.locator(f"#{s}").bounding_box() for s in ("chat .message-wrap", "composer"))
    assert (column["x"], column["width"]) == (box["x"], box["width"])
    page.get_by_role("button", name="Settings").first.click()
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


def test_a_phone_on_its_side_with_its_keyboard(visit):
    page = visit(**PHONE, is_mobile=True, has_touch=True)
    expect(page.get_by_role("button", name="Choose a photo")).to_be_visible()
    expect(page.get_by_text("Drop a photo here")).to_be_hidden()  # no finger can
    lines = """[...document.querySelectorAll("#model p")].map((p) => {
        const range = document.createRange();
        range.selectNodeContents(p.lastChild);
        return [p.getBoundingClientRect().left, ...[...range.getClientRects()].map((r) => r.left)];
    })[0]"""
    page.get_by_role("button", name="Settings").first.click()
    left, *starts = page.evaluate(lines)
    assert len(starts) > 1 and min(starts) > left + 60  # below the licence, not below its label
    page.get_by_role("button", name="Close").last.evaluate(
        "close => { close.click(); document.querySelector('#box textarea').focus(); }"
    )
    page.wait_for_timeout(150)  # the button that opened them does not take the focus later
    expect(box(page)).to_be_focused()
    ask(page, "Hello?")
    for height in (390, 200):
        page.wait_for_timeout(300)  # what the answer's end redraws
        page.set_viewport_size({"width": 844, "height": height})
    end = "(e) => e.scrollHeight - e.clientHeight - e.scrollTop < 2"
    wait_for(lambda: page.locator("#chat .bubble-wrap").evaluate(end))

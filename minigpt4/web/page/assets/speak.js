// Reading an answer aloud with the browser's own voice.
(() => {
  const { say, button, set } = window.minigpt4;
  const voice = window.speechSynthesis;
  let reading = null; // its button

  // The commonest words tell the page's languages apart.
  const COMMON = {
    en: /\b(the|and|is|of|with|it)\b/gi, de: /\b(der|die|das|und|ist|mit|ein)\b/gi,
    es: /\b(el|la|los|y|es|con|una|que)\b/gi, zh: /[\u4e00-\u9fff]/g,
  };
  const language = (text) => {
    const count = (tag) => text.match(COMMON[tag])?.length ?? 0;
    return Object.keys(COMMON).reduce((best, tag) => (count(tag) > count(best) ? tag : best));
  };
  const stop = () => {
    voice.cancel();
    if (reading) set(reading, { ariaPressed: "false", title: say("read") });
    reading = null;
  };
  // The answer's text without code. A formula is in the page both as drawn and as written: only the
  // latter is read.
  const heard = (answer) => {
    const copy = answer.cloneNode(true);
    for (const part of copy.querySelectorAll(".katex, .code_wrap, br")) {
      part.replaceWith(part.querySelector("annotation")?.textContent.replace(/^\{\}/, "") ?? "\n");
    }
    return copy.textContent;
  };
  const read = (answer, pressed) => {
    const again = reading === pressed;
    stop();
    if (again) return;
    const text = heard(answer);
    const speech = Object.assign(new SpeechSynthesisUtterance(text), { lang: language(text) });
    speech.onend = speech.onerror = () => { if (reading === pressed) stop(); };
    reading = pressed;
    set(pressed, { ariaPressed: "true", title: say("read_stop") });
    voice.speak(speech);
  };
  const speakable = (buttons, row) => {
    const answer = row.matches(".bot-row") && row.querySelector(".md");
    if (!voice || !answer || buttons.querySelector(".read")) return;
    const made = button("read", "speaker", () => read(answer, made));
    made.classList.add("read", "small");
    set(made, { ariaPressed: "false" });
    buttons.insertBefore(made, buttons.querySelector(".about"));
  };
  addEventListener("pagehide", () => voice?.cancel());
  Object.assign(window.minigpt4, { speakable, silence: () => voice && stop() });
})();

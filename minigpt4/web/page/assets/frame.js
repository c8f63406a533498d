// The page's policy blocks the targets of links and forms, which would leave an empty frame: none is
// followed. Links to a place in the website itself work.
addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href], area[href]");
  if (link && !link.getAttribute("href").startsWith("#")) event.preventDefault();
});
addEventListener("submit", (event) => event.preventDefault());
// A file that is dropped here would replace the page.
for (const type of ["dragover", "drop"]) {
  addEventListener(type, (event) => {
    const taken = event.target.matches?.("[type=file]") || !event.dataTransfer?.types.includes("Files");
    if (!taken) event.preventDefault();
  });
}

// The first script in a website's frame. No policy covers WebRTC, which could send data to another
// host, so it is removed. A frame inside this one would have it again, so such frames are removed as
// soon as they exist, before they load.
{
  delete window.RTCPeerConnection;
  delete window.webkitRTCPeerConnection;
  // Bound now: the website's own script may replace these functions.
  const first = document.querySelector.bind(document, "iframe, frame");
  const remove = Function.prototype.call.bind(Element.prototype.remove);
  new MutationObserver(() => {
    for (let frame; (frame = first()); ) remove(frame);
  }).observe(document, { childList: true, subtree: true });

  // A frame in a shadow root would not be found, so neither calls nor markup (see render.py) can make
  // such a root.
  delete Element.prototype.attachShadow;
  for (const maker of [Element.prototype, Document, Document.prototype]) {
    for (const name of Object.getOwnPropertyNames(maker)) {
      if (name.endsWith("Unsafe")) delete maker[name];
    }
  }
  Document.prototype.write = Document.prototype.writeln = (...html) => {
    document.currentScript?.insertAdjacentHTML("beforebegin", html.join(""));
  };
}

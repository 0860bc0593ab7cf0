// Without this the page is the same, only not live. Parts that have an id are replaced by what the server says of them now.
"use strict";
(() => {
  if (!document.body.hasAttribute("data-live")) return;
  const every = 3000;

  // What somebody is using isn't taken from under his hands.
  const used = part => part.contains(document.activeElement) || part.contains(getSelection().anchorNode) && !getSelection().isCollapsed;

  const renew = async () => {
    if (document.hidden) return;
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    const now = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("main [id]:not([id$='-title'])")) {
      const next = now.getElementById(part.id);
      if (next && part.innerHTML !== next.innerHTML && !used(part)) part.replaceWith(document.importNode(next, true));
    }
  };

  const again = () => setTimeout(() => renew().catch(() => {}).finally(again), every);
  again();

  // What is being fetched moves faster.
  if (document.getElementById("flights")) {
    const live = new EventSource("/api/v1/flights/live");
    live.addEventListener("flights", message => {
      const { flights } = JSON.parse(message.data);
      const rows = document.querySelectorAll("#flights tbody tr");
      if (rows.length !== flights.length) {
        renew().catch(() => {});
        return;
      }
      flights.forEach((flight, i) => {
        const bar = rows[i].querySelector("progress");
        if (bar && flight.size && bar.getAttribute("aria-label") === flight.ref) bar.value = flight.received;
      });
    });
  }
})();

/* What scrolls can be scrolled by the keyboard, and what has a role has a name. */
function nameAndFocus() {
  for (const region of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) {
    if (region.scrollWidth > region.clientWidth) region.tabIndex = 0;
    else region.removeAttribute("tabindex");
  }
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => {
    nav.setAttribute("aria-label", `Code ${i + 1}`);
  });
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
}
nameAndFocus();
new MutationObserver(nameAndFocus).observe(document.body, { childList: true, subtree: true });
window.addEventListener("resize", nameAndFocus);

//! Plans and requests.

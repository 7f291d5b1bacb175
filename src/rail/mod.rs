//! A rail: endpoint, queues and completion dispatch under one owner.

-- Pick threads whose oldest unflushed record is older than the grace; moving their time to now leaves them to the
-- caller for another grace (a visibility time-out).
-- KEYS: dirty
-- ARGV: grace in microseconds, most threads
-- Returns the threads.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local threads = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - ARGV[1]), 'LIMIT', 0, ARGV[2])
for i = 1, #threads do redis.call('ZADD', KEYS[1], string.format('%.0f', now), threads[i]) end
return threads

-- Read a checkpoint by id if it is the hot one.
-- KEYS: hot hash, journal
-- ARGV: checkpoint id
-- Returns {fields and values or false, journal length}.
local fields = false
if redis.call('HGET', KEYS[1], 'id') == ARGV[1] then fields = redis.call('HGETALL', KEYS[1]) end
return {fields, redis.call('XLEN', KEYS[2])}
